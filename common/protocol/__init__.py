"""Everything that crosses the line between server and site."""
