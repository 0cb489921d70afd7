"""Past one machine, by Ray: replicas behind one address, and a file of questions over many machines."""
