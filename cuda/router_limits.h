// What the router's kernels on a GPU choose among: a warp has a token.
#pragma once

namespace dstrain {

constexpr int kMostExperts = 512;
constexpr int kMostExpertsOfToken = 32;
constexpr int kMostExpertGroups = 64;

}  // namespace dstrain
