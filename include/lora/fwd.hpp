#pragma once

#include <lora/version.hpp>

// The names of the library, for headers that only mention them: costs nothing to include.

namespace lora {
inline namespace LORA_ABI {

class Activation;
struct Adapter;
struct AdapterPart;
class Adapters;
class AnyMethod;
class Base;
struct CombineOptions;
class WeightBase;
class LoRAConfig;
class LoRAOptions;
struct LoadOptions;
struct LoadReport;
class MatrixView;
class MethodKind;
class Model;
struct Place;
struct Product;
struct Report;
class Site;
struct Term;
struct Update;

namespace detail {

struct ActiveAdapter;
class ActiveSet;
class ActiveSets;
struct AdapterEntry;
struct AdapterList;
struct HeldWeight;
struct Merging;
struct Scope;
class ScopeGuard;
class StartValues;
class Usage;

}  // namespace detail

template <class Method>
class LoRALinear;
template <class Method>
class LoRAEmbedding;
template <class Method>
class LoRAAttention;

}  // namespace LORA_ABI
}  // namespace lora
