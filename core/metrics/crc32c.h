// CRC-32C (Castagnoli): reflected polynomial 0x82F63B78, as iSCSI and TensorBoard's records use it.
#pragma once

#include <cstdint>
#include <string_view>

namespace dstrain {

// Uses the processor's instruction where there is one.
uint32_t crc32c(std::string_view data);

// The same by table, anywhere; tests hold the two against each other.
uint32_t crc32c_by_table(std::string_view data);

}  // namespace dstrain
