"""Cases over other people's implementations, each a file for `parity run`."""
