"""The server's arithmetic: pure functions of contributions, one file per rule."""
