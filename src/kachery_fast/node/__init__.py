"""The node: keeps a lab's files, answers its clients, and exchanges files with other nodes through channels."""
