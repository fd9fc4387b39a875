// One rank's share in a job of several: its place, and the parts that engines and layers are given.
// The version for one rank is LocalDistribution; parallel/ makes the others.
#pragma once

#include <memory>

#include "core/dist/dist_context.h"
#include "core/dist/place.h"

namespace dstrain {

class Distribution {
 public:
  virtual ~Distribution() = default;
  virtual const RankPlace& place() const = 0;
  virtual TensorParallel& tensor() = 0;
  virtual TokenDispatcher& dispatcher() = 0;
  virtual KvExchange& kv() = 0;
  virtual SequenceSums& sequences() = 0;
  // One per model part. `parameters` has its layout and outlives the store.
  virtual std::unique_ptr<ParamStore> make_param_store(ParameterSet& parameters,
                                                       const ParamStoreOptions& options) = 0;
  // Sum over all ranks of the job, in place; f64 or i64. Every rank calls it.
  virtual void sum_over_ranks(DistStream, const Tensor& x) = 0;
};

}  // namespace dstrain
