"""The project's version, written into every checkpoint and run.json."""

VERSION = "0.5.0"
