"""Members as somebody would add them, a file each; CONTRIBUTING.md has the lists they follow."""
