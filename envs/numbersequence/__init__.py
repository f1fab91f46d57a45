"""NumberSequence: continue an arithmetic or Fibonacci-like sequence, read from a picture."""
