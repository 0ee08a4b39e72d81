"""Work around the product that is not part of it: how its data files are made, and what was measured with it.

Nothing in the wheel imports this package.
"""
