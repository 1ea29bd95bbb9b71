"""The hub: who owns channels, which nodes are on them, and what each may do; signs upload URLs, issues tokens."""
