"""The verbs over a model's adapters, and merging."""
