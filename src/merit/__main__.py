"""``python -m merit`` is the command line; worker processes are started this way."""

from merit.cli import main

if __name__ == "__main__":
    main()
