"""The Python client: stores and loads by content URI, in the local store or through the node of this machine."""
