"""dermafactory: a distributed dataset factory on Ray for synthetic dermatology."""

__version__ = "0.1.0"
