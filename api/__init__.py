"""The Python interface: runs as objects, to be trained, read, scored and evaluated from a script or a notebook."""
