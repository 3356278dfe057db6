"""The code that the GPU kernels of all ops share.

Read kernel.py first: it describes a kernel and a launch as values. cubin.py compiles kernels ahead of time; sdk.py is
the import boundary of Triton.
"""
