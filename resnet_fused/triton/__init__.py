"""The operators in Triton, for GPUs that the compiled library does not reach.

Nothing here is imported before a call needs it, for it imports Triton.
"""
