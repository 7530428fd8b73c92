"""`python -m experiments.control`."""

import sys

from experiments.control.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
