"""Members as somebody would add them, one file each; docs/howto has the lists they follow."""
