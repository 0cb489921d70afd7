"""`python -m uhd_export` is `uhd-export`."""

from uhd_export.cli.main import main

if __name__ == "__main__":
    main()
