"""NumberLine: walk from a start number to a target number, both read from a picture."""
