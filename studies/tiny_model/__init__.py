"""The trained tiny model: its clips and captions, its training, its export and the judge of what it renders.

``docs/tiny_model.md`` has the commands, their times and the figures.
"""
