"""ALFWorld: household tasks as text games, through the official `alfworld` and `textworld` packages.

The folder is not called `alfworld`, so that it cannot be taken for the installed package.
"""
