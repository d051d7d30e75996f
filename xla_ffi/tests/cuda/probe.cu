// temporary: time per kernel
#define main kernels_test_main
#include "tests/cuda/kernels_test.cu"
#undef main
#include "ops/dispatch/plan_cuda.cuh"
#include <thread>
using namespace jax_ep;
int main(int argc,char**argv){
  const int R=2; const int64_t T=4096,H=7168; const int K=8;
  for(int layout=0;layout<2;layout++){
  Case c{.layout=layout?RecvLayout::kExpert:RecvLayout::kRank,.num_ranks=R,.num_tokens=T,.num_topk=K,.num_local_experts=128,.capacity=layout?(int64_t)(T*K*1.25):T*R};
  c.alignment=layout?128:1; c.row_bytes=H*2; c.share_masked=0; c.fill=layout?Fill::kPadding:Fill::kZeros;
  Ranks ranks(R,2,std::chrono::seconds(5));
  DispatchShape shape=c.shape(); int slots=shape.num_send_slots(); std::mt19937 rng(0);
  struct B{Device<int32_t> ids; Device<float> w; Device<std::byte> x,out,back,ws; Device<int32_t> gs,cnt,rs,rk,sr,sk,ti; Device<float> rw;};
  std::vector<B> b; size_t choices=c.capacity*K;
  for(int r=0;r<R;r++){ ranks.Select(r); auto ids=MakeIds(c,rng); std::vector<int32_t> sk; for(int id:ids) sk.push_back(id<0?-1:shape.experts.RankOf(id));
    b.push_back({Device(ids),Device<float>(ids.size()),Device<std::byte>(T*H*2),Device<std::byte>(c.capacity*H*2),Device<std::byte>(T*H*2),Device<std::byte>(DispatchWorkspaceBytes(shape)),Device<int32_t>(128),Device<int32_t>(3),Device<int32_t>(c.capacity),Device<int32_t>(c.capacity),Device<int32_t>(T*slots),Device(sk),Device<int32_t>(choices),Device<float>(choices)}); Cuda(cudaDeviceSynchronize()); }
  for(int sms:{8,12,16,20,24,32,48,64}){
   const int N=20; std::vector<std::vector<cudaEvent_t>> ev(R);
   for(int r=0;r<R;r++){ ranks.Select(r); ev[r].resize(N*6); for(auto&e:ev[r]) Cuda(cudaEventCreate(&e)); }
   std::vector<std::thread> th;
   for(int r=0;r<R;r++) th.emplace_back([&,r]{ ranks.Select(r); 
     for(int i=0;i<N;i++){
      DispatchLaunch l{.self=ranks.endpoint(r),.position=ranks.position(r),.args={.shape=shape,.fill=c.fill,.topk_idx=b[r].ids.get(),.topk_weights=b[r].w.get(),.num_streams=1,.streams={},.group_sizes=b[r].gs.get(),.num_recv=b[r].cnt.get(),.num_dropped=b[r].cnt.get()+1,.num_invalid=b[r].cnt.get()+2,.recv_src=b[r].rs.get(),.recv_k=layout?b[r].rk.get():nullptr,.send_row=b[r].sr.get(),.recv_topk_idx=layout?nullptr:b[r].ti.get(),.recv_weights=b[r].rw.get()},.workspace=b[r].ws.get()};
      l.args.streams[0]={b[r].x.get(),b[r].out.get(),(size_t)H*2};
      auto rec=[&](int k){ Cuda(cudaEventRecord(ev[r][i*6+k],ranks.stream(r))); };
      const PlanShape ps=MakePlanShape(shape); const PlanWorkspace ws=PlanWorkspace::At(l.workspace,ps);
      const PlanArgs plan{.self=l.self,.position=l.position,.args=l.args,.shape=ps,.workspace=ws};
      rec(0); Cuda(LaunchPlan(plan,sms,ranks.stream(r)));
      rec(1); Cuda(LaunchDispatch(l,ranks.traits(),sms,ranks.stream(r))); rec(2);
      CombineLaunch cl{.self=l.self,.position=l.position,.args={.layout=c.layout,.dtype=DType::kBF16,.num_ranks=R,.num_slots=slots,.num_tokens=T,.recv_capacity=c.capacity,.hidden=H,.send_rank=layout?b[r].sk.get():nullptr,.send_row=b[r].sr.get(),.weights=layout?b[r].rw.get():nullptr,.rows=b[r].out.get(),.num_biases=0,.biases={},.out=b[r].back.get()}};
      Cuda(LaunchCombine(cl,ranks.traits(),sms,ranks.stream(r))); rec(3);
      PullRowsLaunch pl{.self=l.self,.position=l.position,.args={.num_ranks=R,.num_rows=T,.num_pulled=c.capacity,.row_bytes=(size_t)H*2,.index=b[r].rs.get(),.rows=b[r].x.get(),.out=b[r].out.get()}};
      Cuda(LaunchPullRows(pl,ranks.traits(),sms,ranks.stream(r))); rec(4);
     }});
   for(auto&t:th)t.join(); ranks.Synchronize(); CHECK(!ranks.HasFailed(),sms);
   double v[4]; for(int k=0;k<4;k++){ std::vector<float> s; for(int i=5;i<N;i++){ float m=0; for(int r=0;r<R;r++){ float ms; Cuda(cudaEventElapsedTime(&ms,ev[r][i*6+k],ev[r][i*6+k+1])); m=std::max(m,ms);} s.push_back(m*1e3);} std::sort(s.begin(),s.end()); v[k]=s[s.size()/2]; }
   printf("%s sms=%d plan %.1f dispatch %.1f combine %.1f pull %.1f us\n",layout?"expert":"rank",sms,v[0],v[1],v[2],v[3]); fflush(stdout);
  }}
}
