# Turns CUDA C++ into C++ (sed -E -z, a whole file at a time; lines keep their numbers).

s/([A-Za-z0-9_:]+(<[^;<>]*(<[^;<>]*>[^;<>]*)*>)?)([ \n]*)<<<([^;]*)>>>\(\);/::cuda_on_cpu::Launch(\5)\4.run(\1);/g
s/([A-Za-z0-9_:]+(<[^;<>]*(<[^;<>]*>[^;<>]*)*>)?)([ \n]*)<<<([^;]*)>>>\(/::cuda_on_cpu::Launch(\5)\4.run(\1, /g

# Blocks run one after the other, so what they share can be static.
s/extern __shared__ (__align__\([0-9]+\) )?([A-Za-z0-9_ ]+) ([A-Za-z0-9_]+)\[\];/\2* const \3 = ::cuda_on_cpu::dynamic_shared<\2>();/g
s/__shared__ (alignas\([0-9]+\) )?([A-Za-z0-9_]+) ([^;]*);/\1static \2 \3; ::cuda_on_cpu::enter_shared(\3);/g
:sizes
s/(::cuda_on_cpu::enter_shared\([^];[]*)\[[^]]*\]/\1/
t sizes

# Instructions of the GPU. What no rule knows does not pass the assembler.
s/asm volatile\("st\.global\.v[24]\.b32 [^"]*"[^;]*\);/*to = word;/g
s/asm\("ex2\.approx\.ftz\.f32 [^"]*"[^;]*\((x \* [0-9.f]+)\)\);/y = exp2f(\1);/g
