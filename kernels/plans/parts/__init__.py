"""What several plans share: tiles, the search for a threshold, instruction sets of CPUs."""
