"""The proving ground: small problems whose exact answer is known, for the same losses that train the model."""
