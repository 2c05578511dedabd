"""What setup.py needs to build the native module: which torch, which CUDA, which kind of build, and the call of CMake.

Used at build time only and never installed. Nothing here imports torch into setup.py's own process.
"""
