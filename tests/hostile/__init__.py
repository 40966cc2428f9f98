"""Tables, databases and model folders that are mutated at random: one line, or what they say."""
