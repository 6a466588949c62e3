"""Pure tensor mathematics: no modules, no names, no state. Import from the files; nothing is re-exported."""
