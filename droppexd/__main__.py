"""`python -m droppexd` is `droppexd`."""

from droppexd.cli.daemon import main

if __name__ == "__main__":
    main()
