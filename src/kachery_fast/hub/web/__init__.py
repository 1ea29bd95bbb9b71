"""The hub's website: pages rendered here, forms that are actions, and a little script that is not needed."""
