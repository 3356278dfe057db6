// Nodes of every op: valid ones, and ones whose attributes, shapes, dtypes or inputs were then changed.
#pragma once

#include "choice.h"
#include "host.h"

// A valid node with random sizes and values.
host::Node valid_node(Choice& choice);

// Changes one thing of a node, as a stranger's graph may have it.
void make_hostile(Choice& choice, host::Node& node);
