"""Putting adapters into a model, all or nothing, and taking them out again.

`prepare` does everything that can fail and leaves the model as it is: it finds the modules (`sites`), plans,
and builds layers, copies and rows beside the model. `Injection.commit` then puts them in their places.
"""
