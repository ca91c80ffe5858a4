"""Other libraries' experts under this project's signature: adapters, imported when asked for by name.

Each module is named like its library and exports ``BACKENDS``, a dict of (forward, Support) by backend; a
peer is named ``<library>.<backend>``. It is measured and verified as its library computes it, defects
included.
"""
