// libcurand: the provider links to it, and calls nothing of it for our graphs.
int fake_curand(void) { return 1; }
