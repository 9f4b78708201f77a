"""Back up, check and restore the data stores of CommCare HQ."""

__version__ = "0.1.0"
