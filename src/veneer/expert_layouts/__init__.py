"""The layouts in which programs write the factors of a mixture's experts."""
