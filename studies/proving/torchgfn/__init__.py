"""Our losses against torchgfn's, an independent implementation: the same values, and how long training takes.

`make compare-torchgfn` makes `.venv-torchgfn` (`environment`) and runs `__main__` in it: torchgfn wants numpy < 2,
so it lives apart from everything else. Our losses need nothing but torch and are imported from the checkout.
"""
