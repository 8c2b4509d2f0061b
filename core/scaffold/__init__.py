"""Starting packages for authors of plugins: what `python -m core plugins new` writes.

Each kind has a folder of templates here, which is a whole, working plugin.  `package.py` fills in the
names and writes it.
"""
