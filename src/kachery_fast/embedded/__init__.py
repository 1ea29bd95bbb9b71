"""The one-machine engines: an object server with the semantics of Google Cloud Storage, and a pub/sub broker that
speaks the Ably realtime protocol. The hub mounts both into its own HTTP server."""
