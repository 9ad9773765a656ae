"""Parts that two families of models share."""
