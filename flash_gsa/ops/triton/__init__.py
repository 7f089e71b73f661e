"""Triton kernels of the operator; `backend.py` launches them."""
