"""Many runs of `veneer train` in one: a grid of options, trained as a family, bad runs stopped early.

Nothing here is imported by ``import veneer``, and what the command line checks first needs no torch.
"""
