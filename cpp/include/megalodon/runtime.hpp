// Everything: #include <megalodon/runtime.hpp>, link megalodon::runtime.
#pragma once

#include "megalodon/bundle.hpp"
#include "megalodon/engine.hpp"
#include "megalodon/error.hpp"
#include "megalodon/log.hpp"
#include "megalodon/sampling.hpp"
#include "megalodon/session.hpp"
#include "megalodon/tensor.hpp"
#include "megalodon/tokenizer.hpp"
