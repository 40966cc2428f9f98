"""CPUs, through C++ and the machine's own compiler."""
