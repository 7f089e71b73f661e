"""flash-gsa: Gated Slot Attention — operator, models, training, constant-memory inference."""

__version__ = "0.1.0"
