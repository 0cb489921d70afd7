"""The command line's front door in a clone: `python cli.py` is `uhd-export`."""

from uhd_export.cli.main import main

if __name__ == "__main__":
    main()
