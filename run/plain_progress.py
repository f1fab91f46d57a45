"""How often long work says how far it is where there is no terminal for a bar."""

PLAIN_INTERVAL_S = 10.0
