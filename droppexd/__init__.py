"""droppex: files on the machines you already have, coded so that losing some loses nothing."""

__version__ = "0.1.0"
