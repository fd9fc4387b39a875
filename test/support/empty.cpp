// Keeps the library non-empty where Catch2 brings its own main.
