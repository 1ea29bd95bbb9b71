"""The website in a real browser, with real nodes."""
